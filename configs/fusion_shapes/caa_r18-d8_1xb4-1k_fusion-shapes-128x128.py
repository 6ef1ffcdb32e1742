_base_ = './aa_r18-d8_1xb4-1k_fusion-shapes-128x128.py'
model = dict(decode_head=dict(attention='channelized_axial'))
