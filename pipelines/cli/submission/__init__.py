"""How a raydit command becomes a Ray job, on this machine or on another one."""
