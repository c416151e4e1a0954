"""Pictures and tables of results, one idea a file; matplotlib is imported when one is drawn.

Read `figure.py` first: what all pictures have in common.
"""
