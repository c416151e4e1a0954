"""Where traces come from: one external format a file, each a function `read(path, options)`.

Read `detect.py` first (`read_any`, the door), then `common.py` (what every reader hands over and
how it is checked) and `load.py` (how a stranger's file is opened safely). A new format is one
new file with a `read` and one line in `detect.READERS`.
"""
