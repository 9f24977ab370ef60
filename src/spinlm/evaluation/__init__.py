"""What is measured on the held-out part, and the verifiers of tasks that have one."""
