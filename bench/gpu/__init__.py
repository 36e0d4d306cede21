"""`python -m dkv.bench.gpu`, and the table of operations that it shares with the micro-benchmarks and the tests."""
