"""What reading a Parquet file may raise; light, for those who need no table."""

from __future__ import annotations

import pyarrow as pa

# Of a damaged file; a name in it that is no text gives the last one.
UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)
