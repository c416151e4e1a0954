"""The command line: stdout is the answer, stderr is everything else, exit codes are 0, 1 and 2.

Read `main.py` first. A command's module is light; what it needs is imported when it runs.
"""
