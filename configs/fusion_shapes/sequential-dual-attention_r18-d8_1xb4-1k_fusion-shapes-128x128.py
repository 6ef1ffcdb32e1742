# Channel attention, then spatial attention; a branch behind a stop-gradient shows the first alone.
_base_ = './danet_r18-d8_1xb4-1k_fusion-shapes-128x128.py'
model = dict(decode_head=dict(type='SequentialDualAttentionHead'))
