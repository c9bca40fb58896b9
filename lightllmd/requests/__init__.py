"""What is asked, whatever the dialect: checked against the plan, tokenised, made into jobs that an engine can run."""
