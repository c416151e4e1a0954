"""Published systems as policies over one simulator, one system a file; read `claim.py` first.

Every file names its paper and has one function, `claims(sources)`, which simulates what the paper
claims and returns the published figure, ours, and the band that was fixed beforehand.
"""
