"""What happens then: engine, lowering, simulation, reports, command line.

Read `engine.py` first: a Program of tasks on streams goes in, a Timeline comes out.
"""

__version__ = "0.1.0"
