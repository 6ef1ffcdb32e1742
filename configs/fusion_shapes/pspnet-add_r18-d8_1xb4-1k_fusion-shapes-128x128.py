_base_ = './gff_r18-d8_1xb4-1k_fusion-shapes-128x128.py'
model = dict(decode_head=dict(neck=dict(fusion='add')))
