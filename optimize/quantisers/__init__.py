"""How the codes of one matrix are chosen: pure functions from numbers to `Blocks`."""
