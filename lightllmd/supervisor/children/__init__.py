"""One process below the supervisor: started, watched, classified when it ends, restarted by policy."""
