"""Long checks by hand: `make campaign`."""
