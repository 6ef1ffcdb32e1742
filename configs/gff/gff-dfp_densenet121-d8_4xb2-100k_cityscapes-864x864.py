_base_ = './gff_densenet121-d8_4xb2-100k_cityscapes-864x864.py'
model = dict(decode_head=dict(dfp='conv'))
