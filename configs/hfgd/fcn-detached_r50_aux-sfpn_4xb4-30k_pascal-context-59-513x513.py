_base_ = './fcn_r50_aux-sfpn_4xb4-30k_pascal-context-59-513x513.py'
# The FCN looks at the backbone without moving it.
model = dict(decode_head=dict(type='DetachedFCNHead'))
