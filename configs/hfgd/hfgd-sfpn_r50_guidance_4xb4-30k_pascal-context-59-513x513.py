_base_ = './sfpn_r50_4xb4-30k_pascal-context-59-513x513.py'
# Guidance without axial attention.
model = dict(decode_head=dict(guidance=True))
