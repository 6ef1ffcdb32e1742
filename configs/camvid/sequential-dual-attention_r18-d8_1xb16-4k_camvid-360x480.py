# Channel attention, then spatial attention; a branch behind a stop-gradient shows the first alone.
_base_ = './danet_r18-d8_1xb16-4k_camvid-360x480.py'
model = dict(decode_head=dict(type='SequentialDualAttentionHead'))
