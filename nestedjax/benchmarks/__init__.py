"""What things cost: benchmarks that print a table and write rows."""
