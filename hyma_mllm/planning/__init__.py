"""What a run needs and costs, said before it begins."""
