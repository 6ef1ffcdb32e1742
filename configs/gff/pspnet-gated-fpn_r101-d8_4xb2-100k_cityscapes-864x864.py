_base_ = './gff_r101-d8_4xb2-100k_cityscapes-864x864.py'
model = dict(decode_head=dict(neck=dict(fusion='gated_fpn')))
