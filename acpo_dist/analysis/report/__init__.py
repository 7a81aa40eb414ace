"""What people look at after and while a run goes: reports, comparisons, lists of runs."""
