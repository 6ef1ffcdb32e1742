# Sequential dual attention, of the conflict study in section 3.2: a branch behind a stop-gradient
# shows what the channel attention answers before the spatial attention follows.
_base_ = './danet_r50-d8_4xb4-40k_pascal-context-59-513x513.py'
model = dict(decode_head=dict(type='SequentialDualAttentionHead'))
