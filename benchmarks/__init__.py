"""Speed side by side with a peer: both run in turn in one process, and what is reported is the ratio."""
