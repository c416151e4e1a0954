"""Plans as the engines' own files, one engine a file.

Every writer checks what the engine's loader does not, and returns the flags to launch with.
"""
