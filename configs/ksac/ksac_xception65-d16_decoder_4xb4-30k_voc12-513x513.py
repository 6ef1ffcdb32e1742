_base_ = [
    '../_base_/models/ksac_xception65-d16.py',  # KSAC with Xception-65 and decoder, output stride 16
    '../_base_/datasets/pascal_voc12_513x513.py',  # VOC 2012 alone, 21 classes, batch 4 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_30k_wd1e-4.py'  # SGD, lr 0.01, wd 1e-4, polynomial decay to 0
]
crop_size = (513, 513)
data_preprocessor = dict(size=crop_size)
model = dict(data_preprocessor=data_preprocessor)
# The thesis' last stage, from a checkpoint of the one before: --cfg-options load_from=FILE
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=4e-5))
