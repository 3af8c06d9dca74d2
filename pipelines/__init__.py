"""Annotations to rows to Arrow shards to batches."""
