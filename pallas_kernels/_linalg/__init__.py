"""Linear algebra that the operations share, in plain JAX: products, inverses, scans."""
