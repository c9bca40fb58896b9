"""HTTP/1.1 as both servers speak it, the api workers' and the control socket's: bounded in bytes, time and number."""
