"""`prism status`: how far outputs are, read from their files alone, while they are being written. No torch here.

log         lines of a metrics.jsonl that may be written right now
life        whether somebody is still at work on an output, and what a run may be silent for
run         a run of training, extension or RL: progress, losses, speed, goodput, checkpoint, alarms
outputs     the other stages' outputs: prep, evaluation, and any artifact
pipeline    the folder of a chain of stages
text        for people; command: the command line

Owns: what is said about an output. Refuses: a folder that is none. Changes nothing, takes no lock, and needs no process to be there.
"""
