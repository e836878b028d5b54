"""Pure decisions: what is observed and the time go in, what to do comes out. No I/O, no clock, no chance."""
