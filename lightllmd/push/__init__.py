"""The process that pushes metrics to a Prometheus Pushgateway."""
