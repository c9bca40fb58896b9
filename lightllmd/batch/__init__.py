"""Files of OpenAI's batch format, run by the engine in this process: `python -m lightllmd.batch`, or `run_batch`."""
