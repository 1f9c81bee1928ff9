"""`make campaign`: minutes of random kills, full disks and damaged files. It lies here, not in bench/: it times nothing, it tests.

Each module is one part: it takes a seed and a number of cases, prints how many ended how, and exits 1 on a failure. A
short form of each is in the test suite.
"""
