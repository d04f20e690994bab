"""The three doors for new methods: mask sources, dense labellers, students.

Each is a protocol, the params of its methods, and a table of them by name. Nothing here needs
torch: the network of a method is imported when it is loaded.
"""
