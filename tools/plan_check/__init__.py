"""What tools/check_plan.py runs in the processes that it measures."""
