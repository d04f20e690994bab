"""What a run would meet: the machine, the workspace, and what the params ask for."""
