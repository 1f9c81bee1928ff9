"""`make campaign`: minutes of random kills, full disks and damaged files. It times nothing: it tests.

It lies here rather than in bench/ for that.

Each module is one part: it takes a seed and a number of cases, prints how many ended how, and exits 1 on a failure. A
short form of each is in the test suite.
"""
