"""What the router believes about its nodes. Pure: time comes in as `now_s`, nothing here does I/O."""
