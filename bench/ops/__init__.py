"""One file per op, bench_<op>.py, whose `cases(quick)` yields the rows."""
