"""What people see of a run: progress, status, the report, the model card."""
