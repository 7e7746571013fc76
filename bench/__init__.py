"""Benchmarks. README.md says how to read a row; `fastdecode bench ops` runs those of the ops."""
