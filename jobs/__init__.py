"""Command line, Ray Train and Ray Data drivers, MLflow."""
