_base_ = [
    '../_base_/models/deeplabv3plus_xception65-d16.py',  # DeepLabV3+ with Xception-65, output stride 16
    '../_base_/datasets/pascal_voc12_aug_513x513.py',  # VOC 2012 + SBD, 21 classes, batch 4 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_40k_wd1e-4.py'  # SGD, lr 0.01, wd 1e-4, polynomial decay to 0
]
# From the stage with COCO.
load_from = 'work_dirs/deeplabv3plus_xception65-d16_4xb4-300k_coco-voc12aug-513x513/iter_300000.pth'
crop_size = (513, 513)
data_preprocessor = dict(size=crop_size)
model = dict(data_preprocessor=data_preprocessor)
optim_wrapper = dict(optimizer=dict(lr=4e-4, weight_decay=4e-5))
