"""Load on a server: workloads, clients, arrival processes, reports."""
