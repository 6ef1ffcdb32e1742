_base_ = './gff_lite0-d16_1xb4-1k_camvid-180x240.py'
model = dict(decode_head=dict(neck=dict(fusion='fpn')))
