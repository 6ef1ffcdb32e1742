_base_ = './upernet_swin-t_4xb4-30k_pascal-context-59-513x513.py'
# A run of table 4.8: the same numbers on the same machine.
randomness = dict(seed=0, deterministic=True)
