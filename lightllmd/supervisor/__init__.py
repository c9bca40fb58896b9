"""The supervisor: desired state, child processes, jobs and the control plane."""
