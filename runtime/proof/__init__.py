"""The proof: does this machine compute what PyTorch computed? References, replays, questions, limits and verdicts."""
