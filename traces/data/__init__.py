"""The bundled trace and the scripts that make it; read README.md beside this file first.

Nothing in the library imports these scripts: they need torch, the trace they write does not.
"""
