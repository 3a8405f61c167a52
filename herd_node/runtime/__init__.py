"""What both programs stand on: time, tasks, files and locks, chance, logs, the machine's own addresses.

The only package that reads a clock, makes a task or draws a random number; everything else receives what it
needs. It knows neither routing nor HTTP.
"""
