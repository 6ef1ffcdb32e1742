_base_ = './gff_r18-d8_1xb16-4k_camvid-360x480.py'
model = dict(decode_head=dict(neck=dict(fusion='gated_fpn')))
