"""`python -m acpo_dist`, as `accelerate launch -m acpo_dist train CONFIG` starts it."""

from acpo_dist.cli import main

main()
