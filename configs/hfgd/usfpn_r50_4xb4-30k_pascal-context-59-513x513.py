_base_ = './sfpn_r50_4xb4-30k_pascal-context-59-513x513.py'
model = dict(decode_head=dict(upsampler=dict(type='USFPNHead')))
